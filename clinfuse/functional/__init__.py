"""Stateless image maths on tensors."""
