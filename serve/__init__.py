"""Serve"""
