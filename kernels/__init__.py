"""The operations that decide speed and exactness, one function each."""
