"""The conformance kit: what a plugin's author tests with. Everything is imported from its own module, on use."""
