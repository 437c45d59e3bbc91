//! Looking at some of the events only, without bias.

/// Most that may be left out: one in 2^10 is looked at.
pub const MAX_SHIFT: u32 = 10;

/// Whether an event is looked at, given a number of which every value is as likely as the
/// next. One in 2^shift is, and counts as [`weight`] events, so that what is expected of any
/// sum is the sum over all events (Horvitz and Thompson, 1952).
#[inline(always)]
pub const fn keeps(random: u32, shift: u32) -> bool {
    random & (weight(shift) - 1) == 0
}

/// As how many events one that is looked at counts.
#[inline(always)]
pub const fn weight(shift: u32) -> u32 {
    1 << (shift & 15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_event_is_expected_to_count_once() {
        for shift in 0..=MAX_SHIFT {
            let values = 1_u64 << (MAX_SHIFT + 2);
            let kept = (0..values).filter(|&value| keeps(value as u32, shift)).count() as u64;
            assert_eq!(kept * u64::from(weight(shift)), values, "shift {shift}");
        }
    }

    proptest! {
        /// The sum of what is kept, each times its weight, lies around the sum of all by no
        /// more than its own standard error allows.
        #[test]
        fn sums_are_unbiased(
            waits in proptest::collection::vec(0_u64..1_000_000, 2_000..4_000),
            shift in 0..=4_u32,
            seed in any::<u64>(),
        ) {
            let mut random = random(seed);
            let weight = f64::from(weight(shift));
            let all: f64 = waits.iter().map(|wait| *wait as f64).sum();
            let kept: f64 = waits
                .iter()
                .filter(|_| keeps(random(), shift))
                .map(|wait| *wait as f64 * weight)
                .sum();
            let squares: f64 = waits.iter().map(|wait| (*wait as f64).powi(2)).sum();
            let error = (squares * (weight - 1.0)).sqrt();
            prop_assert!((kept - all).abs() <= 6.0 * error + 1e-6, "{kept} of {all} ± {error}");
        }

        /// So do the counts of each part of a histogram, also where the shift changes while
        /// events come; and what is kept and what is counted as left out are all there were.
        #[test]
        fn counts_are_unbiased_while_the_shift_changes(
            shifts in proptest::collection::vec(0..=4_u32, 1..8),
            waits in proptest::collection::vec(0..4_usize, 4_000..8_000),
            seed in any::<u64>(),
        ) {
            let mut random = random(seed);
            let (mut all, mut counted, mut variance) = ([0.0; 4], [0.0; 4], [0.0; 4]);
            let (mut kept, mut left_out) = (0, 0);
            for (i, &part) in waits.iter().enumerate() {
                let shift = shifts[i * shifts.len() / waits.len()];
                all[part] += 1.0;
                variance[part] += f64::from(weight(shift)) - 1.0;
                if keeps(random(), shift) {
                    counted[part] += f64::from(weight(shift));
                    kept += 1;
                } else {
                    left_out += 1;
                }
            }
            prop_assert_eq!(kept + left_out, waits.len());
            for part in 0..4 {
                let (off, error) = (counted[part] - all[part], f64::sqrt(variance[part]));
                prop_assert!(f64::abs(off) <= 6.0 * error, "{off} of {} ± {error}", all[part]);
            }
        }
    }

    /// Sebastiano Vigna's splitmix64 (public domain).
    fn random(seed: u64) -> impl FnMut() -> u32 {
        let mut state = seed;
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) as u32
        }
    }
}
