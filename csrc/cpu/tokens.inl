// A row of tokens and the row of a table that is added to it.

static void add_row(Type a_type, const void* a, Type b_type, const void* b, Type out_type, void* out, int64_t width) {
  constexpr int64_t kPiece = 256;
  alignas(64) float x[kPiece], y[kPiece];
  const auto size = [](Type type) { return type == Type::f32 ? 4 : 2; };
  for (int64_t start = 0; start < width; start += kPiece) {
    const int64_t count = width - start < kPiece ? width - start : kPiece;
    load_row(a_type, static_cast<const char*>(a) + start * size(a_type), 1, x, count);
    if (b != nullptr) {
      load_row(b_type, static_cast<const char*>(b) + start * size(b_type), 1, y, count);
      for (int64_t i = 0; i < count; ++i) x[i] += y[i];
    }
    store_row(out_type, static_cast<char*>(out) + start * size(out_type), 1, x, count);
  }
}
