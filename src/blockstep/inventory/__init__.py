"""What one process holds, by name: nodes, jobs, exports, objects. A storage daemon is an inventory with monitors."""
