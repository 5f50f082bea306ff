"""Mathematics that several families of methods need, each thing once."""
