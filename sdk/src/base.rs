//! Base URLs of endpoints.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use hyper::Uri;
use hyper::http::uri::Authority;

use crate::Error;

/// Where one API is: `http://host:port`, perhaps with a path, without `/v1`. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Base(Arc<str>);

impl Base {
    /// Reads a base URL, with or without `/v1`.
    ///
    /// # Errors
    /// If it is no URL of plain HTTP: nodes speak no TLS.
    pub fn parse(url: &str) -> Result<Base, Error> {
        let refuse = |why| Err(Error::Endpoint { url: url.to_owned(), why });
        let text = url.trim().trim_end_matches('/');
        let text = text.strip_suffix("/v1").unwrap_or(text);
        let Ok(uri) = text.parse::<Uri>() else { return refuse("it is no URL") };
        match (uri.scheme_str(), uri.authority()) {
            (Some("http"), Some(authority)) => match () {
                () if authority.as_str().contains('@') => {
                    refuse("it holds a user; give the key apart")
                }
                () if uri.query().is_some() => refuse("it holds a query"),
                () if !has_good_port(authority) => refuse("its port is none"),
                () => Ok(Base(text.into())),
            },
            (Some("https"), _) => refuse(
                "nodes speak no TLS; ask over a trusted network, or through a proxy on this host",
            ),
            _ => refuse("it must begin with http://"),
        }
    }

    /// A path below it.
    pub fn join(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it leads to the host that asks.
    pub fn is_loopback(&self) -> bool {
        let uri = self.0.parse::<Uri>().ok();
        uri.as_ref().and_then(Uri::host).is_some_and(|host| {
            let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
            host.eq_ignore_ascii_case("localhost")
                || ip.is_ok_and(|ip| ip.to_canonical().is_loopback())
        })
    }
}

impl fmt::Debug for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a port is absent or one that can be dialled; hyper takes a wrong one for an absent one.
fn has_good_port(authority: &Authority) -> bool {
    let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
    let is_one = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    port.is_empty() || port.strip_prefix(':').is_some_and(is_one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (url, expect) in [
            ("http://127.0.0.1:8420", Ok(("http://127.0.0.1:8420", true))),
            (" http://localhost:8420/v1/ ", Ok(("http://localhost:8420", true))),
            ("http://[::1]:8420/v1", Ok(("http://[::1]:8420", true))),
            ("http://[::ffff:127.0.0.1]:1", Ok(("http://[::ffff:127.0.0.1]:1", true))),
            ("http://vine.example/mesh/v1", Ok(("http://vine.example/mesh", false))),
            ("http://10.0.0.1", Ok(("http://10.0.0.1", false))),
            ("https://10.0.0.1:8420", Err("TLS")),
            ("10.0.0.1:8420", Err("http://")),
            ("ftp://10.0.0.1", Err("http://")),
            ("http://", Err("http://")),
            ("", Err("URL")),
            ("http://key@10.0.0.1:8420", Err("user")),
            ("http://10.0.0.1:99999", Err("port")),
            ("http://10.0.0.1:0", Err("port")),
            ("http://10.0.0.1/?a=b", Err("query")),
            ("http://10.0.0.1 /", Err("URL")),
        ] {
            match (Base::parse(url), expect) {
                (Ok(base), Ok(expect)) => assert_eq!((base.as_str(), base.is_loopback()), expect),
                (Err(error), Err(part)) => {
                    assert!(error.to_string().contains(part), "{url}: {error}")
                }
                (got, expect) => panic!("{url:?}: {got:?}, not {expect:?}"),
            }
        }
    }
}
