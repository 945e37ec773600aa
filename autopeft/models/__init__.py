"""The torch side: knows one model, attaches plans to it, prices, saves and exports them."""
