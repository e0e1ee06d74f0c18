"""What every long job needs: checkpoints, a workdir, progress, signals and written metrics."""
