"""What is a whole MoE layer?"""
