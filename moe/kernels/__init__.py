"""Operations with one meaning and several implementations, chosen by the platform that is lowered for."""
