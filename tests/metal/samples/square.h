// value * value
HELPER float square(float value) {
  return value * value;
}
