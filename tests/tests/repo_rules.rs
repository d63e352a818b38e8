//! Rules of the repository that a machine can check. Each names the invariant it guards
//! (docs/architecture.md).

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the root").to_owned()
}

/// Files below `dir` with the extension, in a stable order, without build outputs.
fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for path in entries.map(|e| e.expect("readable directory").path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A line of code without its comment; good enough for the words looked for here.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// Invariant 1: the pure crates have no IO, clock, thread, ambient randomness or `unsafe`, and never
/// iterate in an order that differs from run to run: a hash map needs a hasher of its own.
#[test]
fn pure_crates_stay_pure() {
    const BANNED: [&str; 17] = [
        "tokio",
        "std::net",
        "std::fs",
        "std::thread",
        "std::process",
        "std::env",
        "Instant::now",
        "SystemTime",
        "rand::",
        "getrandom",
        "unsafe ",
        "HashMap::new",
        "HashSet::new",
        "println!",
        "eprintln!",
        "static mut",
        "RefCell<",
    ];
    let mut broken = Vec::new();
    for krate in ["protocol", "cache", "scheduler"] {
        for path in files(&root().join(krate).join("src"), "rs") {
            for (number, line) in read(&path).lines().enumerate() {
                for word in BANNED.iter().filter(|w| code(line).contains(**w)) {
                    broken.push(format!("{}:{}: {word}", path.display(), number + 1));
                }
            }
        }
    }
    assert!(broken.is_empty(), "pure crates must not use:\n{}", broken.join("\n"));
}

/// Invariant 9: `unsafe` only under kernels/.
#[test]
fn unsafe_only_in_kernels() {
    let root = root();
    let mut broken = Vec::new();
    for krate in ["protocol", "cache", "scheduler", "engine", "node", "sdk", "tests"] {
        for path in files(&root.join(krate), "rs") {
            for (number, line) in read(&path).lines().enumerate() {
                let words = code(line);
                if ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
                    .iter()
                    .any(|w| words.contains(w) && !words.contains('"'))
                {
                    broken.push(format!("{}:{}", path.display(), number + 1));
                }
            }
        }
    }
    assert!(broken.is_empty(), "unsafe outside kernels/:\n{}", broken.join("\n"));
}

/// The house's direction: protocol ► cache ► scheduler ► engine ► node, kernels ► engine.
#[test]
fn dependencies_point_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("protocol", &[][..]),
        ("kernels", &[]),
        ("cache", &["protocol"]),
        ("scheduler", &["cache", "protocol"]),
        ("engine", &["cache", "kernels", "protocol", "scheduler"]),
        ("node", &["cache", "engine", "kernels", "protocol", "scheduler"]),
        ("sdk", &["protocol"]),
    ]);
    for (name, package) in workspace_packages() {
        // Nothing depends on these two, and they may depend on everything.
        if name == "tests" || name == "sim" {
            continue;
        }
        let allowed = allowed.get(name.as_str()).unwrap_or_else(|| {
            panic!("{name}/ is not in the house: a new crate needs an ADR and a line here")
        });
        for dependency in dependencies(&package, &["normal", "build"]) {
            if let Some(inner) = dependency.strip_prefix("grapevine-") {
                assert!(allowed.contains(&inner), "{name} must not depend on {inner}");
            }
        }
    }
}

/// engine is synchronous and knows no sockets; kernels stands on nothing but the OS.
#[test]
fn refused_dependencies() {
    let refused: [(&str, &[&str]); 6] = [
        ("engine", &["tokio", "hyper", "axum", "reqwest", "quinn", "libp2p"]),
        ("kernels", &["tokio", "serde", "serde_json"]),
        ("protocol", &["tokio", "rand", "getrandom"]),
        ("cache", &["tokio", "rand", "serde"]),
        ("scheduler", &["tokio", "rand", "serde"]),
        // Small: what a program that embeds it need not build.
        ("sdk", &["axum", "bincode", "libp2p", "quinn", "reqwest", "rustls", "tower"]),
    ];
    let packages = workspace_packages();
    for (name, refused) in refused {
        let dependencies = dependencies(&packages[name], &["normal"]);
        for word in refused {
            assert!(!dependencies.contains(*word), "{name} must not depend on {word}");
        }
    }
}

/// A file that outgrows this wants to be split by responsibility.
#[test]
fn files_stay_short() {
    const LINES_MAX: usize = 800;
    let root = root();
    let mut long = Vec::new();
    for extension in ["rs", "py", "sh"] {
        for path in files(&root, extension) {
            let lines = read(&path).lines().count();
            if lines > LINES_MAX {
                long.push(format!("{}: {lines} lines", path.display()));
            }
        }
    }
    assert!(long.is_empty(), "over {LINES_MAX} lines:\n{}", long.join("\n"));
}

/// Every local link of README and docs leads somewhere.
#[test]
fn links_in_docs_lead_somewhere() {
    let root = root();
    let mut pages = files(&root.join("docs"), "md");
    pages.extend(["README.md", "CHANGELOG.md"].map(|f| root.join(f)));
    let mut broken = Vec::new();
    for page in pages {
        let text = read(&page);
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            if !page.parent().expect("a file has a folder").join(path).exists() {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

/// The top level is the card's, plus what docs/architecture.md names.
#[test]
fn top_level_is_the_house() {
    const FOLDERS: [&str; 11] = [
        "protocol",
        "cache",
        "scheduler",
        "kernels",
        "engine",
        "node",
        "sdk",
        "tests",
        "deploy",
        "docs",
        "target",
    ];
    for entry in std::fs::read_dir(root()).expect("readable root") {
        let entry = entry.expect("readable root");
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && !name.starts_with('.') {
            assert!(
                FOLDERS.contains(&name.as_str()),
                "{name}/: a new top-level folder needs an ADR"
            );
        }
    }
}

/// Workspace packages by folder name.
fn workspace_packages() -> BTreeMap<String, Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages").clone();
    let folder = |p: &Value| {
        let manifest = PathBuf::from(p["manifest_path"].as_str().expect("a path"));
        let folder = manifest.parent().and_then(Path::file_name).expect("a folder");
        folder.to_string_lossy().into_owned()
    };
    packages.into_iter().map(|p| (folder(&p), p)).collect()
}

fn dependencies(package: &Value, kinds: &[&str]) -> BTreeSet<String> {
    let list = package["dependencies"].as_array().expect("a list of dependencies");
    list.iter()
        .filter(|d| kinds.contains(&d["kind"].as_str().unwrap_or("normal")))
        .filter_map(|d| d["name"].as_str().map(str::to_owned))
        .collect()
}
