def training_page(metrics):
    return "page"
