"""The web page: what it shows, what its tabs do, and the models behind them."""
