//! One build after the other, of the same layout of the maps and of another.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use testkit::fixtures::{Machine, Signal, eventually};

use super::fixture::{Fixture, Own, random_time};
use super::pins::{links, only_version, versions};
use super::{A_START, slots, times};

/// What must be the same before and after, and what may only grow.
struct Before {
    slots: Vec<std::collections::BTreeMap<u32, (std::net::SocketAddr, Option<u32>)>>,
    verdicts: Vec<u64>,
}

/// How soon a server's quota is shared out anew.
const SHARED_WITHIN: Duration = Duration::from_secs(5);
const SERVICES: [&str; 3] = ["agents", "als", "full"];

impl Before {
    fn read(fixture: &Fixture) -> Self {
        let status = fixture.balancer.status();
        Self {
            slots: SERVICES.map(|name| slots(&fixture.balancer, name)).into(),
            verdicts: SERVICES
                .iter()
                .flat_map(|name| status.service(name).verdicts.values().copied())
                .collect(),
        }
    }

    fn quotas(&self, service: usize) -> impl Iterator<Item = Option<u32>> {
        self.slots[service].values().map(|(_, quota)| *quota)
    }

    #[track_caller]
    fn assert_same(&self, fixture: &Fixture) {
        // A server's quota goes from one listener to the next in two steps: first it is taken.
        let after = eventually(SHARED_WITHIN, || {
            let after = Self::read(fixture);
            ensure!(
                after.slots == self.slots,
                "slots, addresses and quotas: {:?}, and {:?} before",
                after.slots,
                self.slots
            );
            Ok(after)
        });
        let shrunk: Vec<_> = self
            .verdicts
            .iter()
            .zip(&after.verdicts)
            .filter(|(a, b)| b < a)
            .collect();
        assert!(
            shrunk.is_empty(),
            "verdicts that were forgotten: {shrunk:?}"
        );
    }
}

#[test]
fn upgraded_ten_times_in_a_row() {
    Machine::with(|machine| {
        let mut fixture = Fixture::start(machine, Own::Group);
        // By hand: for all of a service, and for one slot of another.
        fixture.balancer.quota_set("agents", None, 27);
        let slot = *slots(&fixture.balancer, "als")
            .keys()
            .next()
            .expect("a slot");
        fixture.balancer.quota_set("als", Some(slot), 28);
        for round in 0..10 {
            let state = fixture.balancer.state().to_owned();
            let before = eventually(SHARED_WITHIN, || {
                let before = Before::read(&fixture);
                let shared: u32 = before.quotas(0).flatten().sum();
                ensure!(shared == 27, "of one server: {:?}", before.slots);
                Ok(before)
            });
            assert_eq!(
                before.quotas(1).filter(|quota| *quota == Some(28)).count(),
                1
            );
            let old = links(&state);
            assert_eq!(
                old.len(),
                2,
                "one for the cgroup, one for the namespace: {old:?}"
            );
            if round % 2 == 0 {
                let status = fixture.balancer.stop(Signal::SIGTERM);
                assert!(status.success(), "{}", fixture.balancer.logs());
            } else {
                fixture.kill();
            }
            assert_eq!(links(&state), old, "nothing changes without a daemon");
            fixture.launch();
            let new = links(&state);
            for (path, (id, program)) in &old {
                let (new_id, new_program) = new[path];
                assert_eq!(new_id, *id, "{}: another link", path.display());
                assert_ne!(new_program, *program, "{}: not updated", path.display());
            }
            assert_eq!(new.len(), old.len(), "{new:?}");
            before.assert_same(&fixture);
        }
        fixture.finish("upgraded_ten_times");
    });
}

/// Gives the data plane of a daemon that has ended the name of another layout.
#[track_caller]
pub fn make_another_abi(state: &Path) -> String {
    let current = only_version(state);
    assert_ne!(current, OTHER);
    fs::rename(state.join(&current), state.join(OTHER)).expect("bpffs renames directories");
    current
}

const OTHER: &str = "v999";

/// Listeners and connections of the other layout's data plane are adopted, then the programs change
/// over, then the other one goes.
#[test]
fn another_abi_is_moved_over() {
    Machine::with(|machine| {
        let mut fixture = Fixture::start(machine, Own::Addresses);
        for _ in 0..times(10, 2) {
            fixture.balancer.stop(Signal::SIGTERM);
            let current = make_another_abi(fixture.balancer.state());
            fixture.launch();
            assert_eq!(
                versions(fixture.balancer.state()),
                [current],
                "the other one is gone"
            );
        }
        fixture.finish("upgrade_of_another_abi");
    });
}

#[test]
fn another_abi_is_moved_over_also_when_killed_meanwhile() {
    Machine::with(|machine| {
        let mut fixture = Fixture::start(machine, Own::Addresses);
        for _ in 0..times(10, 2) {
            fixture.balancer.stop(Signal::SIGTERM);
            let current = make_another_abi(fixture.balancer.state());
            for _ in 0..3 {
                fixture.balancer.spawn();
                thread::sleep(random_time(A_START));
                fixture.kill();
            }
            fixture.launch();
            assert_eq!(
                versions(fixture.balancer.state()),
                [current],
                "the other one is gone"
            );
        }
        fixture.finish("upgrade_of_another_abi_killed");
    });
}

/// `unload` knows all layouts.
#[test]
fn another_abi_is_unloaded() {
    Machine::with(|machine| {
        let mut fixture = Fixture::late(machine, Own::Addresses);
        fixture.launch();
        fixture.balancer.stop(Signal::SIGTERM);
        make_another_abi(fixture.balancer.state());
        fixture.balancer.must(&["unload"]);
        assert!(
            !fixture.balancer.state().exists(),
            "{:?}",
            versions(fixture.balancer.state())
        );
        fixture.launch();
        fixture.press_virtual();
        fixture.finish("another_abi_is_unloaded");
    });
}
