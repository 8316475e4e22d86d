// Functions of vectors: the exponential and the normal distribution.

// e^x of a number between -87.33 and 88, to about one ulp; NaN for NaN
FASTMIM_HD Vec exponential_in_range(Vec clamped) {
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;  // rounds to the nearest integer
  const Vec n = shifted - 12582912.0f;
  const Vec r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
  Vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Int power = ((Int)shifted << 23) + (127 << 23);
  return p * (Vec)power;
}

// e^x to about one ulp; 0 below the smallest normal number, NaN for NaN
FASTMIM_HD Vec exponential(Vec x) {
  const Vec value = exponential_in_range(x < -87.33f ? splat(-87.33f) : x > 88.0f ? splat(88.0f) : x);
  return x < -87.33f ? Vec{} : x > 88.0f ? splat(__builtin_inff()) : value;
}

// The normal distribution function Φ(u) and e^(-u²/2): through a polynomial for erfc(x) e^(x²) in 1 / (1 + x/2)
FASTMIM_HD Vec normal_distribution(Vec u, Vec& bell) {
  const Vec x = (u < 0.0f ? -u : u) * 0.707106781f;
  const Vec t = 1.0f / (1.0f + 0.5f * x);
  Vec p = splat(-0x1.e3e4a8p-5f);
  p = p * t + 0x1.2367acp-2f;
  p = p * t - 0x1.f2e4a8p-2f;
  p = p * t + 0x1.1cbdccp-2f;
  p = p * t - 0x1.b43e16p-6f;
  p = p * t + 0x1.9f1a68p-3f;
  p = p * t + 0x1.f1e05cp-3f;
  p = p * t + 0x1.2126fep-2f;
  p = p * t + 0x1.20db44p-2f;
  const Vec exponent = -0.5f * u * u;
  const Vec value = exponential_in_range(exponent < -87.33f ? splat(-87.33f) : exponent);
  bell = exponent < -87.33f ? Vec{} : value;
  const Vec tail = 0.5f * p * t * bell;
  return u < 0.0f ? tail : 1.0f - tail;
}

// the same to 1e-4 of the value, by shorter polynomials: enough for bf16
FASTMIM_HD Vec normal_distribution_bf16(Vec u, Vec& bell) {
  const Vec magnitude = u < 0.0f ? -u : u, t = 1.0f / (1.0f + 0.353553391f * magnitude);
  Vec p = splat(-0.17066003f);
  p = p * t + 0.47129565f;
  p = p * t + 0.10846889f;
  p = p * t + 0.31109001f;
  p = p * t + 0.27988327f;
  const Vec exponent = -0.5f * u * u, clamped = exponent < -87.33f ? splat(-87.33f) : exponent;
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;
  const Vec r = clamped - (shifted - 12582912.0f) * 0.693147181f;
  Vec e = splat(0.0414586165f);
  e = e * r + 0.167909118f;
  e = e * r + 0.500043588f;
  e = e * r + 0.999963402f;
  e = e * r + 0.999999261f;
  bell = exponent < -87.33f ? Vec{} : e * (Vec)(((Int)shifted << 23) + (127 << 23));
  const Vec tail = 0.5f * t * p * bell;
  return u < 0.0f ? tail : 1.0f - tail;
}
