//! Secret keys on disk: one file for each, readable by its owner only.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use protocol::identity::NodeKey;
use thiserror::Error;

/// Why a key is not used. Nothing was changed.
#[derive(Debug, Error)]
pub enum KeyFileError {
    #[error(
        "{} can be read by others (mode {mode:03o}): whoever read it can be this node. If nobody did, \
         `chmod 600` it; else remove it and join again",
        path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error(
        "{} is damaged: restore it from a backup, or remove it and join again as a new node",
        path.display()
    )]
    Damaged { path: PathBuf },
    #[error("cannot {doing} {}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
}

/// Reads the key, `None` if there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<NodeKey>, KeyFileError> {
    Ok(read_secret(path, HEADER)?.map(NodeKey::from_secret))
}

/// Writes a new key: whole and durable under its name, or not at all. A file that is there already is
/// kept and an error.
pub(crate) fn create(path: &Path, key: &NodeKey) -> Result<(), KeyFileError> {
    create_secret(path, HEADER, &key.secret())
}

/// As [`read`], a secret whose file says `header` of itself.
pub(crate) fn read_secret(path: &Path, header: &str) -> Result<Option<[u8; 32]>, KeyFileError> {
    let io = |doing| move |source| KeyFileError::Io { doing, path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("open")(error)),
    };
    let mode = file.metadata().map_err(io("look at"))?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode });
    }
    let mut text = String::new();
    let damaged = || KeyFileError::Damaged { path: path.to_owned() };
    match file.take(FILE_BYTES_MAX).read_to_string(&mut text) {
        Ok(_) => parse(&text, header).map(Some).ok_or_else(damaged),
        Err(error) if error.kind() == ErrorKind::InvalidData => Err(damaged()),
        Err(error) => Err(io("read")(error)),
    }
}

/// As [`create`], a secret whose file says `header` of itself.
pub(crate) fn create_secret(
    path: &Path,
    header: &str,
    secret: &[u8; 32],
) -> Result<(), KeyFileError> {
    let io = |doing| move |source| KeyFileError::Io { doing, path: path.to_owned(), source };
    let unfinished = path.with_extension("new");
    match std::fs::remove_file(&unfinished) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(io("replace")(error)),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .map_err(io("make"))?;
    file.write_all(text(secret, header).as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(io("write"))?;
    // A link, unlike a renaming, never replaces a file.
    let linked = std::fs::hard_link(&unfinished, path);
    let _ = std::fs::remove_file(&unfinished);
    linked.map_err(io("make"))?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory).and_then(|d| d.sync_all()).map_err(io("store"))
}

/// Two lines: what this is, and the secret with a checksum.
fn text(secret: &[u8; 32], header: &str) -> String {
    let sum = blake3::hash(secret);
    format!("{header}\n{}{}\n", HEXLOWER.encode(secret), HEXLOWER.encode(&sum.as_bytes()[..4]))
}

fn parse(text: &str, header: &str) -> Option<[u8; 32]> {
    let line = text.strip_prefix(header)?.strip_prefix('\n')?.strip_suffix('\n')?;
    let bytes: [u8; 36] = HEXLOWER.decode(line.as_bytes()).ok()?.try_into().ok()?;
    let (secret, sum) = bytes.split_first_chunk::<32>()?;
    (&blake3::hash(secret).as_bytes()[..4] == sum).then_some(*secret)
}

const HEADER: &str = "grapevine ed25519 secret key 1";
const FILE_BYTES_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn kept_private_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        let key = NodeKey::from_secret([9; 32]);
        assert!(read(&path).unwrap().is_none());
        create(&path, &key).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().id(), key.id());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let again = create(&path, &NodeKey::from_secret([8; 32])).unwrap_err();
        assert!(matches!(again, KeyFileError::Io { doing: "make", .. }), "{again}");
        assert_eq!(read(&path).unwrap().unwrap().id(), key.id());

        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("node.key") && error.contains("640"), "{error}");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x21;
            std::fs::write(&path, &changed).unwrap();
            assert!(matches!(read(&path), Err(KeyFileError::Damaged { .. })), "{at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(matches!(read(&path), Err(KeyFileError::Damaged { .. })), "cut at {at}");
        }
    }
}
