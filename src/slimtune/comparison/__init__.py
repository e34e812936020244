"""Several methods, budgets and seeds of one recipe, run side by side and put into one table and one figure."""
