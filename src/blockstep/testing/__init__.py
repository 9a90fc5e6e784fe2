"""What tests of block drivers, of pairs and of other programs need. Part of the package: use it for yours."""
