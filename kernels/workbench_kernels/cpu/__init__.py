"""One token on a CPU: C that is compiled on the machine it runs on, and how it is called."""
