//! The command line against real processes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

const VINE: &str = env!("CARGO_BIN_EXE_vine");

/// A process that ends with the test, and the URL of its API.
struct Up(Child, String);

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a node and waits until it says that it is in a mesh.
fn up(data: &Path, join: Option<&str>, admin_key: &str) -> Up {
    let mut command = Command::new(VINE);
    command.args(["up", "--model", "demo", "--api", "127.0.0.1:0", "--mesh", "127.0.0.1:0"]);
    command.arg("--data").arg(data).env_remove("SSLKEYLOGFILE").env("VINE_ADMIN_KEY", admin_key);
    if let Some(token) = join {
        command.args(["--join", token]);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut up = Up(child, String::new());
    let serving = lines.next().expect("it starts").unwrap();
    let url = serving.strip_prefix("serving 1 model(s) at ").and_then(|u| u.strip_suffix("/v1"));
    up.1 = url.expect(&serving).to_owned();
    let mesh = lines.next().expect("it says more").unwrap();
    assert!(mesh.contains(" of mesh "), "{mesh}");
    up
}

fn vine(args: &[&str], data: &Path) -> Result<Value, String> {
    let output =
        Command::new(VINE).args(args).arg("--json").arg("--data").arg(data).output().unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Asks a node over its API who its peers are.
fn remote(url: &str, key: &str) -> Result<Value, String> {
    let mut command = Command::new(VINE);
    let output = command.args(["peers", "--json", "--node", url, "--key", key]).output().unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Where the API is, as the node at `url` says.
fn endpoints(url: &str) -> Vec<String> {
    let address = url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    let head = "GET /v1/endpoints HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let body = answer.split_once("\r\n\r\n").expect(&answer).1;
    let list: Value = serde_json::from_str(body).expect(&answer);
    let nodes = list["data"].as_array().expect(&answer);
    nodes.iter().map(|node| node["urls"][0].as_str().expect(&answer).to_owned()).collect()
}

/// A request that the node has answered is explained, over the socket and over the API.
fn explains(url: &str, data: &Path) {
    let error = vine(&["explain"], data).unwrap_err();
    assert!(error.contains("decided nothing"), "{error}");
    let run = |args: &[&str]| {
        let output = Command::new(VINE).args(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => Err(error),
        }
    };
    run(&["chat", "--endpoint", url, "-n", "3", "hello"]).unwrap();
    let latest = vine(&["explain"], data).unwrap();
    let decision = &latest["decisions"][0];
    assert_eq!((&decision["kind"], &decision["why"]), (&"replica".into(), &"only".into()));
    assert_eq!(decision["chosen"]["node"]["this_node"], true, "{decision}");
    assert!(
        decision["outcome"]["first_token_ms"].as_f64().is_some_and(|ms| ms > 0.0),
        "{decision}"
    );
    let request = latest["request"].as_str().unwrap();
    let by_id = ["explain", request, "--node", url, "--key", "an-admin-key"];
    let text = run(&by_id).unwrap();
    assert!(text.contains("Which replica of demo answers") && text.contains("first token after"));
    let error = run(&["explain", request, "--node", url, "--key", "another-key"]).unwrap_err();
    assert!(error.contains("no admin key"), "{error}");
    let error = vine(&["explain", "../peers"], data).unwrap_err();
    assert!(error.contains("no request's id"), "{error}");
    let unknown = format!("req-{}", "0".repeat(32));
    let error = vine(&["explain", &unknown], data).unwrap_err();
    assert!(error.contains("Ask the node"), "{error}");
}

#[test]
fn invite_join_revoke_leave() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let error = vine(&["invite"], a.path()).unwrap_err();
    assert!(error.contains("vine.sock") && error.contains("vine up"), "{error}");
    let first = up(a.path(), None, "an-admin-key");
    assert_eq!(remote(&first.1, "an-admin-key").unwrap()["peers"].as_array().unwrap().len(), 1);
    let error = remote(&first.1, "another-key").unwrap_err();
    assert!(error.contains("401") && error.contains("no admin key"), "{error}");
    for (args, wanted) in [
        (vec!["invite", "--uses", "0"], "1 to 256"),
        (vec!["invite", "--roles", "king"], "king"),
        (vec!["invite", "--ttl", "soon"], "24h"),
        (vec!["revoke", "zzzz"], "no known node"),
        (vec!["authority", "--remove", "a"], "whole id"),
    ] {
        let error = vine(&args, a.path()).unwrap_err();
        assert!(error.contains(wanted), "{args:?}: {error}");
    }
    explains(&first.1, a.path());
    let token = vine(&["invite", "--ttl", "5m"], a.path()).unwrap();
    let second = up(b.path(), token["token"].as_str(), "");
    let error = remote(&second.1, "an-admin-key").unwrap_err();
    assert!(error.contains("Unix socket") && error.contains("--admin-keys"), "{error}");
    let authority = vine(&["authority"], b.path()).unwrap();
    assert_eq!(authority["root_key_here"], false);
    assert!(authority["nodes"].as_array().is_some_and(|n| !n.is_empty()), "{authority}");
    // Both listen on loopback and are on one host: each tells its clients of the other.
    for (asked, other) in [(&first, &second), (&second, &first)] {
        let expect = [&asked.1, &other.1].map(|url| format!("{url}/v1"));
        let mut told = Vec::new();
        let known = (0..600).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            told = endpoints(&asked.1);
            told == expect
        });
        assert!(known, "not within 30 s: {told:?} instead of {expect:?}");
    }
    // The overlay of both runs on their ports, and the two find each other there, too.
    let overlay = (0..600).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let overlay = vine(&["status"], b.path()).unwrap()["overlay"].clone();
        (overlay["direct"] == 1).then_some(overlay)
    });
    let overlay = overlay.expect("the overlay connects the two within 30 s");
    let (nat, relayed) = (&overlay["nat"], &overlay["relayed"]);
    assert!(
        *nat == "unknown" && *relayed == 0,
        "nobody judges reachability on loopback: {overlay}"
    );
    let left = vine(&["leave"], b.path()).unwrap();
    assert_eq!(left["left"], token["mesh"]);
    let mut second = second;
    assert!(second.0.wait().unwrap().success(), "the node stops by itself");
    assert_eq!(endpoints(&first.1), [format!("{}/v1", first.1)]);
    let revoked = vine(&["revoke", left["node"].as_str().unwrap()], a.path()).unwrap();
    assert_eq!(revoked["revoked"], true);
}
