//! One build after the other, of the same layout of the maps and of another.

use std::fs;
use std::path::Path;
use std::thread;

use testkit::fixtures::{Machine, Signal};

use super::pins::{links, only_version, versions};
use super::scene::{Own, Scene, random_time};
use super::{A_START, slots, times};

/// What must be the same before and after, and what may only grow.
struct Before {
    slots: Vec<std::collections::BTreeMap<u32, (std::net::SocketAddr, Option<u32>)>>,
    verdicts: Vec<u64>,
}

const SERVICES: [&str; 3] = ["agents", "als", "full"];

impl Before {
    fn read(scene: &Scene) -> Self {
        let status = scene.balancer.status();
        Self {
            slots: SERVICES.map(|name| slots(&scene.balancer, name)).into(),
            verdicts: SERVICES
                .iter()
                .flat_map(|name| status.service(name).verdicts.values().copied())
                .collect(),
        }
    }

    #[track_caller]
    fn assert_same(&self, scene: &Scene) {
        let after = Self::read(scene);
        assert_eq!(after.slots, self.slots, "slots, addresses and quotas");
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
        let mut scene = Scene::start(machine, Own::Group);
        // By hand: for all of a service, and for one slot of another.
        scene.balancer.quota_set("agents", None, 27);
        let slot = *slots(&scene.balancer, "als").keys().next().expect("a slot");
        scene.balancer.quota_set("als", Some(slot), 28);
        for round in 0..10 {
            let state = scene.balancer.state().to_owned();
            let before = Before::read(&scene);
            let quotas = |service: usize| before.slots[service].values().map(|(_, quota)| *quota);
            assert!(
                quotas(0).all(|quota| quota == Some(27)),
                "{:?}",
                before.slots
            );
            assert_eq!(quotas(1).filter(|quota| *quota == Some(28)).count(), 1);
            let old = links(&state);
            assert_eq!(
                old.len(),
                2,
                "one for the cgroup, one for the namespace: {old:?}"
            );
            if round % 2 == 0 {
                let status = scene.balancer.stop(Signal::SIGTERM);
                assert!(status.success(), "{}", scene.balancer.logs());
            } else {
                scene.kill();
            }
            assert_eq!(links(&state), old, "nothing changes without a daemon");
            scene.launch();
            let new = links(&state);
            for (path, (id, program)) in &old {
                let (new_id, new_program) = new[path];
                assert_eq!(new_id, *id, "{}: another link", path.display());
                assert_ne!(new_program, *program, "{}: not updated", path.display());
            }
            assert_eq!(new.len(), old.len(), "{new:?}");
            before.assert_same(&scene);
        }
        scene.finish("upgraded_ten_times");
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

/// Listeners and connections of the other layout's data plane are adopted, then the programs change over, then the other one goes.
#[test]
fn another_abi_is_moved_over() {
    Machine::with(|machine| {
        let mut scene = Scene::start(machine, Own::Addresses);
        for _ in 0..times(10, 2) {
            scene.balancer.stop(Signal::SIGTERM);
            let current = make_another_abi(scene.balancer.state());
            scene.launch();
            assert_eq!(
                versions(scene.balancer.state()),
                [current],
                "the other one is gone"
            );
        }
        scene.finish("upgrade_of_another_abi");
    });
}

#[test]
fn another_abi_is_moved_over_also_when_killed_meanwhile() {
    Machine::with(|machine| {
        let mut scene = Scene::start(machine, Own::Addresses);
        for _ in 0..times(10, 2) {
            scene.balancer.stop(Signal::SIGTERM);
            let current = make_another_abi(scene.balancer.state());
            for _ in 0..3 {
                scene.balancer.spawn();
                thread::sleep(random_time(A_START));
                scene.kill();
            }
            scene.launch();
            assert_eq!(
                versions(scene.balancer.state()),
                [current],
                "the other one is gone"
            );
        }
        scene.finish("upgrade_of_another_abi_killed");
    });
}

/// `unload` knows all layouts.
#[test]
fn another_abi_is_unloaded() {
    Machine::with(|machine| {
        let mut scene = Scene::late(machine, Own::Addresses);
        scene.launch();
        scene.balancer.stop(Signal::SIGTERM);
        make_another_abi(scene.balancer.state());
        scene.balancer.must(&["unload"]);
        assert!(
            !scene.balancer.state().exists(),
            "{:?}",
            versions(scene.balancer.state())
        );
        scene.launch();
        scene.press_virtual();
        scene.finish("another_abi_is_unloaded");
    });
}
