"""A toy method of the tests: badges, boxes in which every token is raised."""
