"""Settings of the `clipkit diffusion` commands, a file each."""
