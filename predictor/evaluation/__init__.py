"""How good forecasts are: metrics, comparison with rivals, tables, pictures, report."""
