"""Other libraries' entry points to what is here; each is switched on by a call and off by another."""
