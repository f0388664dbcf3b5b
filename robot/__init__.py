"""The Franka Panda behind SERL's robot server: limits, HTTP client, cameras, operators, environment, and a simulation.

Nothing here imports torch, except classifier.py. docs/real_robot.md describes how to use it.
"""
