"""Methods that change how weights are spread before others round them."""
