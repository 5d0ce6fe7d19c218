"""Where a run's time goes, and how far that is from what this machine could do: `train --profile`."""
