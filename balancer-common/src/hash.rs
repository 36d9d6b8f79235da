//! Hashes and the fixed-point logarithm of rendezvous hashing. There are no floats in BPF.

/// Fractional bits of [`negative_log2`].
pub const LOG_BITS: u32 = 32;
const STEPS: usize = 256;
const STEP_BITS: u32 = 8;

/// log2(1 + i / 256) with 32 fractional bits.
static LOG2: [u64; STEPS + 1] = log2_table();

/// One bit of the logarithm for each squaring: x in [1, 2), x² in [1, 4), the bit says whether it
/// left [1, 2).
const fn log2_of_mantissa(step: usize) -> u64 {
    if step == STEPS {
        return 1 << LOG_BITS;
    }
    let mut x: u128 = (1u128 << 62) + ((step as u128) << (62 - STEP_BITS));
    let mut log = 0;
    let mut bit = 0;
    while bit < LOG_BITS {
        x = (x * x) >> 62;
        log <<= 1;
        if x >= 1 << 63 {
            log |= 1;
            x >>= 1;
        }
        bit += 1;
    }
    log
}

const fn log2_table() -> [u64; STEPS + 1] {
    let mut table = [0; STEPS + 1];
    let mut step = 0;
    while step <= STEPS {
        table[step] = log2_of_mantissa(step);
        step += 1;
    }
    table
}

/// Spreads every bit of `x` over the whole word (the finaliser of `MurmurHash3`).
#[inline(always)]
pub const fn mix(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// The hash of an address alone: what source-hash goes by.
#[inline(always)]
pub fn of_source(high: u64, low: u64) -> u64 {
    mix(high ^ mix(low ^ 0x9e37_79b9_7f4a_7c15))
}

/// The hash of a connection's four-tuple, of which the local half may be any stable number.
#[inline(always)]
pub fn of_tuple(source: u64, source_port: u16, local: u64, local_port: u16) -> u64 {
    mix(source ^ mix(local ^ ((source_port as u64) << 16 | local_port as u64)))
}

/// -log2((hash + 1) / 2³²) with [`LOG_BITS`] fractional bits, by table and linear interpolation
/// (error below 3e-6).
#[inline(always)]
pub fn negative_log2(hash: u32) -> u64 {
    let x = hash as u64 + 1;
    let exponent = 63 - x.leading_zeros() as u64;
    // The 32 bits below the leading one, which is bit 32 at most.
    let fraction = ((x << (32u64.wrapping_sub(exponent) & 63)) & 0xffff_ffff) as u32;
    let step = (fraction >> (32 - STEP_BITS)) as usize & (STEPS - 1);
    let rest = (fraction & ((1 << (32 - STEP_BITS)) - 1)) as u64;
    let low = LOG2[step];
    let high = LOG2[step + 1];
    let log = (exponent << LOG_BITS) + low + (((high - low) * rest) >> (32 - STEP_BITS));
    (32 << LOG_BITS) - log
}

/// Weighted rendezvous hashing: the member with the smallest score wins. Each member's score
/// depends on the key and on itself alone, so that a member that comes or goes moves only what it
/// must; with -ln(u)/weight each wins in proportion to its weight.
#[inline(always)]
pub fn rendezvous_score(key: u64, member: u64, weight: u32) -> u64 {
    let hash = mix(key ^ mix(member)) >> 32;
    let score = negative_log2(hash as u32) << 14;
    // A division takes as long as all the rest.
    if weight <= 1 {
        score
    } else {
        score / weight as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn logarithm_is_close_to_the_real_one(hash: u32) {
            let real = -((f64::from(hash) + 1.0) / 4_294_967_296.0).log2();
            #[expect(clippy::cast_precision_loss, reason = "a comparison with a tolerance")]
            let ours = negative_log2(hash) as f64 / 4_294_967_296.0;
            prop_assert!((real - ours).abs() < 4e-6, "{real} {ours}");
        }

        #[test]
        fn score_never_panics_and_fits(key: u64, member: u64, weight: u32) {
            prop_assert!(rendezvous_score(key, member, weight) < 1 << 52);
        }
    }

    #[test]
    fn logarithm_is_right_at_the_ends() {
        assert_eq!(negative_log2(u32::MAX), 0);
        assert_eq!(negative_log2(0), 32 << LOG_BITS);
    }
}
