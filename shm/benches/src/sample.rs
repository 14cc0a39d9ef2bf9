//! Draws the requested objects and their sizes. The result is determined by a seed.

use fastrand::Rng;

/// Length of all keys.
pub(crate) const KEY_LEN: usize = 38;

/// A key, which looks like the URL of a page.
pub(crate) type Key = [u8; KEY_LEN];

/// Smallest and largest size of an object, in bytes.
const SIZES: (f64, f64) = (102.4, 256.0 * 1024.0);
/// Standard deviation of the logarithm of the sizes.
const SPREAD: f64 = 1.5;

/// Returns the key of an object. There are 100 million keys.
pub(crate) fn key(object: u32) -> Key {
    let mut key = *b"https://shop.example/articles/00000000";
    let mut rest = object;
    for digit in key.iter_mut().rev().take(8) {
        *digit = b"0123456789"[(rest % 10) as usize];
        rest /= 10;
    }
    key
}

/// Zipf's law: the object of rank r, starting at 1, is requested with a probability proportional to 1 / r^exponent.
#[derive(Debug)]
pub(crate) struct Zipf {
    /// For each object, the sum of the weights of all objects up to this one.
    cumulative: Vec<f64>,
}

impl Zipf {
    pub(crate) fn new(objects: u32, exponent: f64) -> Zipf {
        let mut sum = 0.0;
        let up_to = |rank| {
            sum += f64::from(rank).powf(-exponent);
            sum
        };
        Zipf { cumulative: (1..=objects).map(up_to).collect() }
    }

    /// Draws an object. The number of an object is its rank minus one.
    pub(crate) fn draw(&self, rng: &mut Rng) -> u32 {
        let total = self.cumulative.last().copied().unwrap_or_default();
        let at = rng.f64() * total;
        let index = self.cumulative.partition_point(|&sum| sum <= at).min(self.cumulative.len().saturating_sub(1));
        u32::try_from(index).expect("the number of objects fits into a u32")
    }
}

/// Log-normal sizes in bytes, clamped to a range. Their median is chosen so that the first `objects` have a given total size.
#[derive(Debug)]
pub(crate) struct Sizes {
    median: f64,
}

impl Sizes {
    /// Returns the sizes of `objects` objects, and the distribution for further sizes.
    pub(crate) fn new(objects: u32, total: u64, rng: &mut Rng) -> (Vec<u32>, Sizes) {
        let normals: Vec<f64> = (0..objects).map(|_| normal(rng)).collect();
        let sum = |median: f64| normals.iter().map(|&z| u64::from(size(median, z))).sum::<u64>();
        let (mut low, mut high) = SIZES;
        // After 40 bisections, the error is less than a byte.
        for _ in 0..40 {
            let middle = f64::midpoint(low, high);
            if sum(middle) < total { low = middle } else { high = middle }
        }
        (normals.iter().map(|&z| size(low, z)).collect(), Sizes { median: low })
    }

    pub(crate) fn draw(&self, rng: &mut Rng) -> u32 {
        size(self.median, normal(rng))
    }
}

fn size(median: f64, z: f64) -> u32 {
    let (least, most) = SIZES;
    let bytes = (median * (SPREAD * z).exp()).clamp(least, most);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a range within u32")]
    let bytes = bytes as u32;
    bytes
}

/// Draws from the standard normal distribution, with the Box-Muller transform.
fn normal(rng: &mut Rng) -> f64 {
    let (u, v) = (1.0 - rng.f64(), rng.f64());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_urls_and_differ() {
        assert_eq!(&key(0), b"https://shop.example/articles/00000000");
        assert_eq!(&key(12_345_678), b"https://shop.example/articles/12345678");
    }

    #[test]
    fn zipf_gives_each_rank_its_share() {
        let (zipf, mut rng) = (Zipf::new(1000, 1.0), Rng::with_seed(7));
        let mut counts = vec![0_u32; 1000];
        (0..1_000_000).for_each(|_| counts[zipf.draw(&mut rng) as usize] += 1);
        let harmonic: f64 = (1..=1000).map(|rank| 1.0 / f64::from(rank)).sum();
        for rank in [1_u32, 2, 10, 100] {
            let expected = 1e6 / harmonic / f64::from(rank);
            let found = f64::from(counts[rank as usize - 1]);
            assert!((found / expected - 1.0).abs() < 0.1, "rank {rank}: {found} of {expected}");
        }
        assert!(counts[999] > 0);
    }

    #[test]
    fn sizes_have_the_requested_sum_and_range() {
        let mut rng = Rng::with_seed(7);
        let (sizes, law) = Sizes::new(50_000, 787 << 20, &mut rng);
        let sum: u64 = sizes.iter().map(|&size| u64::from(size)).sum();
        assert!(sum.abs_diff(787 << 20) < 100_000, "{sum}");
        let more = (0..50_000).map(|_| law.draw(&mut rng));
        assert!(sizes.iter().copied().chain(more).all(|size| (102..=262_144).contains(&size)));
    }
}
