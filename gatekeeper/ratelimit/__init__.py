"""Who may come in, and how often: rates, the algorithms that count them, the rules that name them."""
