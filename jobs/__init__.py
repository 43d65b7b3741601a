"""Train, publish and learn"""
