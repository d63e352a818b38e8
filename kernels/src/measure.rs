//! What this machine can do at best: the bounds that benchmarks are held against.
//!
//! Memory is read in one stream for each thread; arithmetic runs in registers. Results are those
//! of the moment: other load on the machine lowers them.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::isa::Isa;
use crate::pool::ThreadPool;

/// Measured rates of all threads of a pool together.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Bytes read from memory per second.
    pub memory_bytes_per_second: f64,
    /// f32 operations per second; a fused multiply-add is two.
    pub f32_flops: f64,
    /// int8 operations per second; a multiply-add is two. With AVX2 those that add pairs of products
    /// in 16 bits, which weights of eight bits cannot reach. `None` where nothing multiplies bytes.
    pub int8_ops: Option<f64>,
    /// Operations on pairs of bfloat16 per second; a multiply-add is two. `None` without instructions
    /// for them.
    pub bf16_flops: Option<f64>,
}

/// Measures for about `budget` in all. Takes [`memory_bytes`] for the time of the call.
pub fn measure(pool: &ThreadPool, isa: Isa, budget: Duration) -> Peaks {
    let has_pairs = isa == Isa::Avx512Bf16;
    let share = budget / if has_pairs { 4 } else { 3 };
    let fma = |rounds: u64| flops_in_registers(isa, rounds);
    let dot = |rounds: u64| ops_in_registers(isa, rounds);
    let pairs = |rounds: u64| pairs_in_registers(isa, rounds);
    Peaks {
        memory_bytes_per_second: memory(pool, share),
        f32_flops: arithmetic(pool, share, &fma),
        int8_ops: has_dots(isa).then(|| arithmetic(pool, share, &dot)),
        bf16_flops: has_pairs.then(|| arithmetic(pool, share, &pairs)),
    }
}

/// Memory that [`measure`] takes with so many threads: 128 MiB each.
pub const fn memory_bytes(threads: usize) -> usize {
    threads * WORDS_PER_THREAD * 8
}

fn memory(pool: &ThreadPool, budget: Duration) -> f64 {
    let words = vec![1_u64; WORDS_PER_THREAD * pool.threads()];
    let bytes = (words.len() * 8) as f64;
    let seconds = best(budget, || {
        pool.run(pool.threads(), &|task| {
            let part = &words[task * WORDS_PER_THREAD..][..WORDS_PER_THREAD];
            black_box(part.iter().fold(0_u64, |sum, w| sum.wrapping_add(*w)));
        });
    });
    bytes / seconds
}

/// `run` does a number of rounds and gives the operations of one of them.
fn arithmetic(pool: &ThreadPool, budget: Duration, run: &(dyn Fn(u64) -> u64 + Sync)) -> f64 {
    let operations = run(1) * ROUNDS * pool.threads() as u64;
    let seconds = best(budget, || {
        pool.run(pool.threads(), &|_| {
            black_box(run(black_box(ROUNDS)));
        });
    });
    operations as f64 / seconds
}

/// Seconds of the fastest call within the budget, of at least three.
fn best(budget: Duration, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut calls = 0;
    while calls < 3 || start.elapsed() < budget {
        let begin = Instant::now();
        call();
        best = best.min(begin.elapsed().as_secs_f64());
        calls += 1;
    }
    best
}

/// Whether kernels multiply bytes, and not what they are widened to.
fn has_dots(isa: Isa) -> bool {
    isa > Isa::Scalar && isa != Isa::Neon
}

fn flops_in_registers(isa: Isa, rounds: u64) -> u64 {
    isa.assert_available();
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: asserted above.
        Isa::Avx512 | Isa::Avx512Bf16 => return unsafe { x86::fma_512(rounds) },
        // SAFETY: asserted above.
        Isa::Avx2 => return unsafe { x86::fma_256(rounds) },
        _ => {}
    }
    #[cfg(target_arch = "aarch64")]
    if isa >= Isa::Neon {
        // SAFETY: asserted above.
        return unsafe { crate::arch::neon::fma_rounds(rounds) };
    }
    let mut acc = [1.0_f32; 8];
    for _ in 0..rounds {
        for a in &mut acc {
            *a = *a * black_box(0.5) + 0.25;
        }
    }
    black_box(acc);
    8 * 2
}

fn ops_in_registers(isa: Isa, rounds: u64) -> u64 {
    isa.assert_available();
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: asserted above.
        Isa::Avx512 | Isa::Avx512Bf16 => return unsafe { x86::dot_512(rounds) },
        // SAFETY: asserted above.
        Isa::Avx2 => return unsafe { x86::dot_256(rounds) },
        _ => {}
    }
    #[cfg(target_arch = "aarch64")]
    if has_dots(isa) {
        // SAFETY: asserted above.
        return unsafe { crate::arch::neon::dot_rounds(isa, rounds) };
    }
    rounds
}

/// Whether this CPU, which has [`Isa::Avx512Bf16`], multiplies pairs of bfloat16 faster than single floats.
/// Takes a tenth of a millisecond.
pub(crate) fn pairs_pay() -> bool {
    const ROUNDS: u64 = 1 << 10;
    let pace = |run: &dyn Fn(u64) -> u64| {
        let seconds = best(Duration::ZERO, || {
            black_box(run(black_box(ROUNDS)));
        });
        run(1) as f64 / seconds
    };
    let singles = pace(&|rounds| flops_in_registers(Isa::Avx512Bf16, rounds));
    let pairs = pace(&|rounds| pairs_in_registers(Isa::Avx512Bf16, rounds));
    pairs > 1.25 * singles
}

fn pairs_in_registers(isa: Isa, rounds: u64) -> u64 {
    isa.assert_available();
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 {
        // SAFETY: asserted above.
        return unsafe { x86::pairs_512(rounds) };
    }
    rounds
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Enough independent chains to hide the latency of the instructions.
    const CHAINS: usize = 16;

    // SAFETY: callers prove AVX-512.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn fma_512(rounds: u64) -> u64 {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut acc = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for chain in &mut acc {
                *chain = _mm512_fmadd_ps(*chain, a, b);
            }
        }
        black_box(acc);
        (CHAINS * 16 * 2) as u64
    }

    // SAFETY: callers prove AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn fma_256(rounds: u64) -> u64 {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        let mut acc = [_mm256_set1_ps(1.0); 12];
        for _ in 0..rounds {
            for chain in &mut acc {
                *chain = _mm256_fmadd_ps(*chain, a, b);
            }
        }
        black_box(acc);
        12 * 8 * 2
    }

    // SAFETY: callers prove AVX2.
    #[target_feature(enable = "avx2")]
    pub unsafe fn dot_256(rounds: u64) -> u64 {
        let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
        let mut acc = [a; 8];
        for _ in 0..rounds {
            for chain in &mut acc {
                // The chain goes through the product, or the compiler would compute it once.
                *chain = _mm256_add_epi16(_mm256_maddubs_epi16(*chain, b), a);
            }
        }
        black_box(acc);
        8 * 32 * 2
    }

    // SAFETY: callers prove AVX-512 BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn pairs_512(rounds: u64) -> u64 {
        // SAFETY: as long, and every content is valid.
        let a = unsafe { std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(black_box(0.5))) };
        let mut acc = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for chain in &mut acc {
                *chain = _mm512_dpbf16_ps(*chain, a, a);
            }
        }
        black_box(acc);
        (CHAINS * 32 * 2) as u64
    }

    // SAFETY: callers prove AVX-512 VNNI.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub unsafe fn dot_512(rounds: u64) -> u64 {
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
        let mut acc = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for chain in &mut acc {
                *chain = _mm512_dpbusd_epi32(*chain, a, b);
            }
        }
        black_box(acc);
        (CHAINS * 64 * 2) as u64
    }
}

/// 128 MiB: far beyond any cache of a core. Miri counts no bytes per second.
const WORDS_PER_THREAD: usize = if cfg!(miri) { 1 << 10 } else { 16 << 20 };
const ROUNDS: u64 = if cfg!(miri) { 1 } else { 1 << 20 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_isa_has_rates() {
        let pool = ThreadPool::new(2);
        for isa in Isa::available() {
            let run = |rounds: u64| flops_in_registers(isa, rounds);
            assert!(arithmetic(&pool, Duration::ZERO, &run) > 0.0, "{isa}");
            let run = |rounds: u64| ops_in_registers(isa, rounds);
            assert!(!has_dots(isa) || arithmetic(&pool, Duration::ZERO, &run) > 0.0, "{isa}");
            let run = |rounds: u64| pairs_in_registers(isa, rounds);
            assert!(isa != Isa::Avx512Bf16 || arithmetic(&pool, Duration::ZERO, &run) > 0.0);
        }
        assert!(memory(&pool, Duration::ZERO) > 0.0);
    }
}
