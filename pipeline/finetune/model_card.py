def model_card(metrics):
    return "card\n"
