"""Operations on the CPU in C++, built on first use where a compiler is there."""
