//! The scenario files, random faults, and the promise that a seed is a run.

use std::path::{Path, PathBuf};

use sim::scenario::Scenario;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let entries = std::fs::read_dir(folder).expect("scenarios/ is there");
    let mut files: Vec<_> = entries.map(|e| e.expect("readable").path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "toml"));
    files.sort();
    files
}

fn scenario(file: &Path) -> Scenario {
    let text = std::fs::read_to_string(file).expect("readable");
    Scenario::parse(&text).unwrap_or_else(|e| panic!("{}: {e:#}", file.display()))
}

#[test]
fn every_scenario_ends_as_it_must() {
    let files = files();
    assert!(files.len() >= 15, "{} scenarios", files.len());
    let failed: Vec<_> = files
        .iter()
        .filter_map(|file| {
            let error = scenario(file).run().err()?;
            Some(format!("{}: {error:#}", file.file_name()?.display()))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let bytes = |scenario: &Scenario| scenario.simulate(true).world.transcript.expect("kept");
    let short = |mut scenario: Scenario| {
        scenario.end_s = scenario.end_s.min(40.0);
        scenario
    };
    for scenario in files().iter().map(|f| short(scenario(f))).filter(|s| s.nodes <= 60) {
        let first = bytes(&scenario);
        assert!(first.len() > 5_000, "{}: {} bytes", scenario.about, first.len());
        assert!(first == bytes(&scenario), "{}: two runs differ", scenario.about);
    }
    for seed in [3, 4] {
        assert!(bytes(&Scenario::mixed(seed)) == bytes(&Scenario::mixed(seed)), "seed {seed}");
    }
    assert!(bytes(&Scenario::mixed(3)) != bytes(&Scenario::mixed(4)));
}

#[test]
fn views_converge_after_mixed_faults() {
    let failed: Vec<_> = (0..SEEDS)
        .filter_map(|seed| Some(format!("seed {seed}: {:#}", Scenario::mixed(seed).run().err()?)))
        .collect();
    assert!(failed.is_empty(), "replay with `simulate replay SEED`\n{}", failed.join("\n"));
}

const SEEDS: u64 = 25;
