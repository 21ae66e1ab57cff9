"""The paths: what each is (contract), their table (registry), and a file or folder for each."""
