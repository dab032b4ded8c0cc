"""`anyattn doctor`: what is installed, what is usable, and what is known to be wrong here."""
