#![no_main]

use grapevine_engine_fuzz::{grammar, let_caught_panics_pass};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: let_caught_panics_pass(), |bytes: &[u8]| grammar::schema(bytes));
