"""Background work over tables: takes no input, safe to run anywhere and twice."""
