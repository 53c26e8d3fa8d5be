"""What every other package may use: ids, clock formats, errors, limits, settings, faults, logs."""
