"""Which data should a vision-language model learn from, and in what order?"""
