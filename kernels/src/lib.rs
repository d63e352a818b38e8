//! Arithmetic: quantized formats, matrix products, attention and norms, chosen at run time for
//! the CPU.
//!
//! Owns every `unsafe` line of the project. Refuses to know about models, files or requests: it
//! sees slices and shapes. Every kernel gives the same bits whatever the number of tokens in the
//! call, their order and the number of threads, so that batching can never change an answer.
//!
//! The tests run under Miri too, which has no vector instructions, so on the scalar kernels and the
//! thread pool, with small shapes. Some expect panics, and Miri needs long to write a backtrace:
//!
//! ```sh
//! RUST_BACKTRACE=0 MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test -p grapevine-kernels
//! ```

mod arch;
pub mod attention;
pub mod float;
pub mod format;
pub mod isa;
pub mod linear;
pub mod map;
pub mod measure;
pub mod ops;
pub mod pages;
pub mod pool;
pub mod quant;
mod simd;
