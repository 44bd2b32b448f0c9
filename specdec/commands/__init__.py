"""The commands of `specdec`. Their modules import light; the engine is imported when one runs."""
