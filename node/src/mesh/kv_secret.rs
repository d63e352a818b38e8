//! The secret from which every node of a mesh derives the tenants' salts: without it a node has other
//! names for the same KV blocks and can share none.
//!
//! Who founds the mesh makes it; who joins asks the members that it knows. It goes only to members, over their connections,
//! and lies in a file of its own. It opens nothing: it only names blocks, which a member gives to members only.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::key_file::{self, KeyFileError};
use super::{Call, Mesh, Roster, random};

/// The method: an empty body, answered with the secret.
pub(super) const KV_SECRET: &str = "kv-secret";

/// The secret of this node, once it has it.
pub(super) type Kept = OnceLock<[u8; 32]>;

/// The secret of the node's mesh: from its file, or made by its founder, or asked for. `None` if nobody
/// who has it can be reached; the node is as good as ever, but shares no blocks.
///
/// # Errors
/// If the file is damaged, can be read by others, or cannot be written.
pub async fn kv_secret(
    mesh: &Mesh,
    roster: &Arc<Roster>,
    data: &Path,
) -> Result<Option<[u8; 32]>, KeyFileError> {
    let Some(standing) = mesh.standing() else { return Ok(None) };
    let path = data.join(format!("kv-{}.key", standing.trust.mesh().short()));
    let secret = match key_file::read_secret(&path, HEADER)? {
        Some(secret) => secret,
        None => {
            let contacts = mesh.identity().contacts(None);
            let is_alone = contacts.iter().all(|contact| contact.node == mesh.node());
            let secret = match ask(mesh).await {
                Some(secret) => secret,
                None if is_alone => random(),
                None => return Ok(None),
            };
            key_file::create_secret(&path, HEADER, &secret)?;
            secret
        }
    };
    let _ = roster.kv_secret().set(secret);
    Ok(Some(secret))
}

/// Asks the known members, one after the other.
async fn ask(mesh: &Mesh) -> Option<[u8; 32]> {
    let contacts = mesh.identity().contacts(None).into_iter().take(ASKED_MAX);
    for contact in contacts.filter(|contact| contact.node != mesh.node()) {
        for &address in &contact.addresses {
            let asking = async {
                mesh.connect(address, Some(contact.node)).await.ok()?;
                mesh.call(contact.node, KV_SECRET, Vec::new(), ASK_WAIT).await.ok()
            };
            let answered = tokio::time::timeout(ASK_WAIT, asking).await.ok().flatten();
            if let Some(secret) = answered.and_then(|bytes| bytes.try_into().ok()) {
                return Some(secret);
            }
        }
    }
    None
}

/// Answers a member that asks.
pub(super) async fn answer(kept: Option<[u8; 32]>, call: Call) {
    // The caller may be gone; it asks others.
    let _ = match kept {
        Some(secret) => call.stream.reply(secret.to_vec()).await,
        None => call.stream.refuse(super::CODE_FAILED, "this node has none").await,
    };
}

const HEADER: &str = "grapevine kv secret 1";
/// Members that are asked, and the time that each address gets.
const ASKED_MAX: usize = 8;
const ASK_WAIT: Duration = Duration::from_secs(2);
