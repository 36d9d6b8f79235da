//! Backends that are named and don't listen.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;

use balancer_common::abi::{Address, Backend, ListenRule};
use balancer_common::decision::member::fits_family;

use super::notes::Note;
use super::paths::Paths;
use super::plan::Rules;

/// A backend that is named and does not listen, as the daemon notes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DownNote {
    /// The name of its service.
    pub service: String,
    /// Where it should listen.
    pub address: SocketAddr,
    /// Since when it is known not to, ns of `CLOCK_MONOTONIC`.
    pub since_ns: u64,
}

/// Those of the named addresses on which none of the backends listens.
pub fn not_listened_on<'a>(
    named: impl IntoIterator<Item = &'a SocketAddr>,
    listening: &[&Backend],
) -> BTreeSet<SocketAddr> {
    let is_listened_on = |address: &SocketAddr| {
        let mut listening = listening.iter();
        listening.any(|backend| takes(backend, *address))
    };
    let named = named.into_iter().filter(|address| !is_listened_on(address));
    named.copied().collect()
}

/// Whether connections to an address reach a listener.
fn takes(backend: &Backend, address: SocketAddr) -> bool {
    let wanted = Address::from(address.ip().to_canonical());
    let of_family = || fits_family(backend.flags, address.ip().to_canonical().is_ipv4());
    backend.port == address.port()
        && (backend.address == wanted || backend.address.is_any() && of_family())
}

impl Rules {
    /// The addresses and ports that services list for their backends, by the service's id.
    pub fn listed(&self) -> BTreeMap<u16, BTreeSet<SocketAddr>> {
        let mut listed: BTreeMap<u16, BTreeSet<SocketAddr>> = BTreeMap::new();
        for (key, rule) in &self.0 {
            let Ok(port) = u16::try_from(key.port) else {
                continue;
            };
            if !key.address.is_any() && rule.flags & ListenRule::WILDCARD_ONLY == 0 {
                let address = SocketAddr::new(key.address.into(), port);
                listed.entry(rule.service).or_default().insert(address);
            }
        }
        listed
    }
}

/// What a daemon has noted; what can't be read is not there.
pub fn read_notes(paths: &Paths) -> Vec<DownNote> {
    let note = Note::down(paths).read().unwrap_or_default();
    note.lines().filter_map(parse).collect()
}

/// Notes which backends are down, in place of what was noted.
///
/// # Errors
/// When the file can't be written.
pub fn write_notes(paths: &Paths, down: &[DownNote]) -> io::Result<()> {
    let line = |down: &DownNote| format!("{} {} {}\n", down.since_ns, down.address, down.service);
    let note = Note::down(paths);
    if down.is_empty() {
        note.remove();
        return Ok(());
    }
    note.write(&down.iter().map(line).collect::<String>())
}

fn parse(line: &str) -> Option<DownNote> {
    let mut words = line.split(' ');
    let since_ns = words.next()?.parse().ok()?;
    let address = words.next()?.parse().ok()?;
    Some(DownNote {
        service: words.next()?.to_owned(),
        address,
        since_ns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use balancer_common::abi::PortKey;

    fn listener(address: &str, flags: u32) -> Backend {
        let address: SocketAddr = address.parse().expect("an address");
        Backend {
            address: if address.ip().is_unspecified() {
                Address::ANY
            } else {
                address.ip().into()
            },
            port: address.port(),
            flags,
            ..Backend::EMPTY
        }
    }

    #[test]
    fn a_wildcard_listener_is_the_backend_of_its_families() {
        let named: Vec<SocketAddr> = ["127.0.0.1:1", "127.0.0.1:2", "[::1]:1"]
            .map(|address| address.parse().expect("an address"))
            .into();
        let (v6, only) = (Backend::V6, Backend::V6 | Backend::V6_ONLY);
        for (listeners, down) in [
            (vec![], vec![0, 1, 2]),
            (vec![listener("127.0.0.1:1", 0)], vec![1, 2]),
            (vec![listener("127.0.0.9:1", 0)], vec![0, 1, 2]),
            (vec![listener("0.0.0.0:1", 0)], vec![1, 2]),
            (vec![listener("[::]:1", v6)], vec![1]),
            (vec![listener("[::]:1", only)], vec![0, 1]),
            (
                vec![listener("[::]:1", v6), listener("0.0.0.0:2", 0)],
                vec![],
            ),
        ] {
            let listening: Vec<&Backend> = listeners.iter().collect();
            let expected: BTreeSet<SocketAddr> = down.into_iter().map(|at| named[at]).collect();
            assert_eq!(not_listened_on(&named, &listening), expected);
        }
    }

    #[test]
    fn addresses_alone_are_listed_and_each_once() {
        let rule = |flags| ListenRule {
            service: 3,
            flags,
            weight: 1,
        };
        let address = Address::from_v4_be(u32::from_ne_bytes([127, 0, 0, 1]));
        let key = |netns, address| PortKey::new(netns, address, 21_801);
        let rules = Rules(BTreeMap::from([
            (key(7, address), rule(0)),
            (key(8, address), rule(0)),
            (key(7, Address::ANY), rule(ListenRule::WILDCARD_ONLY)),
        ]));
        let expected = BTreeSet::from(["127.0.0.1:21801".parse().expect("an address")]);
        assert_eq!(rules.listed(), BTreeMap::from([(3, expected)]));
    }

    #[test]
    fn notes_are_read_as_they_were_written_until_they_are_empty() {
        let directory = tempfile::tempdir().expect("a directory");
        let paths = Paths::new(directory.path());
        assert_eq!(read_notes(&paths), []);
        let note = |service: &str, address: &str, since_ns| DownNote {
            service: service.to_owned(),
            address: address.parse().expect("an address"),
            since_ns,
        };
        let notes = [note("agents", "127.0.0.1:1", 5), note("als", "[::1]:2", 6)];
        write_notes(&paths, &notes).expect("written");
        assert_eq!(read_notes(&paths), notes);
        Note::down(&paths)
            .write("garbage\n1 2 3\n7 127.0.0.1:1 agents\n")
            .expect("written");
        assert_eq!(read_notes(&paths), [note("agents", "127.0.0.1:1", 7)]);
        write_notes(&paths, &[]).expect("removed");
        assert!(!Note::down(&paths).path().exists());
    }
}
