"""What a notebook calls on a trained run."""
