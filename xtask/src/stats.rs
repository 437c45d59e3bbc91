//! Medians and bootstrap intervals for figures. Deterministic: the resampling is seeded, so
//! the same measurements always give the same interval.

/// Resamples behind an interval. 2,000 put the ends of a 95 % interval within about a tenth
/// of its width (Efron and Tibshirani, "An Introduction to the Bootstrap", section 14.3,
/// ask for 1,000 to 2,000 for percentile intervals).
const RESAMPLES: usize = 2_000;

/// The median; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The value below which the share `q` of the values lies (nearest rank); NaN of nothing.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() {
        return f64::NAN;
    }
    let rank = (q * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted[rank.min(sorted.len()) - 1]
}

/// 95 % percentile-bootstrap interval of the median.
pub fn median_ci95(values: &[f64]) -> Option<[f64; 2]> {
    interval(values.len(), |draw| {
        let resample: Vec<f64> = draw.iter().map(|&i| values[i]).collect();
        median(&resample)
    })
}

/// 95 % percentile-bootstrap interval of the mean.
pub fn mean_ci95(values: &[f64]) -> Option<[f64; 2]> {
    interval(values.len(), |draw| draw.iter().map(|&i| values[i]).sum::<f64>() / draw.len() as f64)
}

/// 95 % percentile-bootstrap interval of `median(ours) / median(other)`, where the i-th of
/// both come from the same round: rounds are drawn as pairs, so drift that hits both cancels.
pub fn ratio_ci95(ours: &[f64], other: &[f64]) -> Option<[f64; 2]> {
    interval(ours.len().min(other.len()), |draw| {
        let ours: Vec<f64> = draw.iter().map(|&i| ours[i]).collect();
        let other: Vec<f64> = draw.iter().map(|&i| other[i]).collect();
        median(&ours) / median(&other)
    })
}

fn interval(n: usize, statistic: impl Fn(&[usize]) -> f64) -> Option<[f64; 2]> {
    if n < 2 {
        return None;
    }
    let mut random = SplitMix64(0x5eed);
    let mut draw = vec![0; n];
    let found: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            draw.fill_with(|| (random.next() % n as u64) as usize);
            statistic(&draw)
        })
        .collect();
    Some([quantile(&found, 0.025), quantile(&found, 0.975)])
}

/// Sebastiano Vigna's generator (public domain, <https://prng.di.unimi.it/splitmix64.c>):
/// enough for resampling, and no dependency.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn quantile_is_nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&values, 0.99), 99.0);
        assert_eq!(quantile(&values, 1.0), 100.0);
        assert_eq!(quantile(&values, 0.0), 1.0);
    }

    #[test]
    fn interval_holds_the_median_and_is_repeatable() {
        let values: Vec<f64> = (0..30).map(|i| 10.0 + f64::from(i % 7)).collect();
        let [low, high] = median_ci95(&values).unwrap();
        assert!(low <= median(&values) && median(&values) <= high && low < high);
        assert_eq!(median_ci95(&values), Some([low, high]));
        assert_eq!(median_ci95(&[1.0]), None);
    }

    #[test]
    fn ratio_cancels_common_drift() {
        let other: Vec<f64> = (1..=20).map(f64::from).collect();
        let ours: Vec<f64> = other.iter().map(|v| v * 0.5).collect();
        assert_eq!(ratio_ci95(&ours, &other), Some([0.5, 0.5]));
    }
}
