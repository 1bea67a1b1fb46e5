"""Operations in 8 bits: fp8 matrices and their products, and flat blocks for communication."""
