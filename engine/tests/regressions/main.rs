//! Every input that once failed in a fuzz target, given to it again: `regressions/<target>/`.

use std::path::Path;
use std::time::{Duration, Instant};

#[path = "../../fuzz/src/lib.rs"]
mod fuzz;

#[test]
fn inputs_that_failed_once() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/regressions");
    let mut tried = 0;
    for entry in std::fs::read_dir(root).expect("a folder") {
        let folder = entry.expect("an entry").path();
        if !folder.is_dir() {
            continue;
        }
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        let target = fuzz::TARGETS.iter().find(|(target, _)| *target == name);
        let (_, target) = target.unwrap_or_else(|| panic!("{name}/ is of no target"));
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let began = Instant::now();
            println!("{}", path.display());
            target(&std::fs::read(&path).expect("an input"));
            assert!(began.elapsed() < TIME_MAX, "{} takes too long", path.display());
            tried += 1;
        }
    }
    assert!(tried > 0, "the folders are there");
}

/// What one input may take here, in a build that is neither optimised nor alone on its machine.
const TIME_MAX: Duration = Duration::from_secs(20);
