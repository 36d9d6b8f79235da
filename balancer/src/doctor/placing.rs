//! Whether connects of this node's clients are placed, and whose are not.

use std::path::Path;

use balancer_common::place::PlaceReason;

use super::{Check, listing};
use crate::dataplane::{
    DaemonNotes, EndpointGroupSnapshot, EndpointSnapshot, Part, Paths, PlacingNotes,
};

/// What there is to say of placing on this node; nothing where there is no frontend.
pub(super) fn checks(state_dir: &Path, groups: &[EndpointGroupSnapshot]) -> Vec<Check> {
    let paths = Paths::new(state_dir);
    let notes = DaemonNotes::read(&paths).placing;
    if groups.iter().all(EndpointGroupSnapshot::is_removed) && notes == PlacingNotes::default() {
        return Vec::new();
    }
    let links = Paths::links(&paths.current()).unwrap_or_default();
    let mut links = links.iter();
    let attached = links.any(|link| link.program.hook.part() == Part::Placing);
    let mut checks = vec![
        attachment(attached, &notes),
        room(&notes),
        endpoints(groups),
    ];
    checks.extend(sidecars(groups));
    checks
}

fn attachment(attached: bool, notes: &PlacingNotes) -> Check {
    const NAME: &str = "placing";
    const MEANS: &str =
        "connects to frontends go where clients send them, and everything else works";
    match &notes.refused {
        Some(why) => Check::warn(
            NAME,
            format!("refused: {why}"),
            MEANS,
            "see the check `other connect`, if there is one; the daemon tries again every 30 s, and \
             at once with `balancer reload`",
        ),
        None if attached => Check::ok(
            NAME,
            "the programs that place are attached",
            "`balancer status` shows the frontends and where their connects go",
        ),
        None => Check::warn(
            NAME,
            "the programs that place are not attached",
            MEANS,
            "start `balancer run`; where it runs, its log says why",
        ),
    }
}

/// Limits of the maps that are exceeded.
fn room(notes: &PlacingNotes) -> Check {
    Check::warn_of(
        "room to place",
        &notes.left_out,
        (
            "for every frontend and endpoint",
            "nothing is left out of the maps",
        ),
        "what is left out is not chosen, or not placed at all",
        "name fewer of them: in a file `connect`; in a cluster, `service`, `selector` or `namespace` \
         of an entry narrows down which Services are meant",
    )
}

/// Whose connects the endpoints of this node don't have as they should.
fn endpoints(groups: &[EndpointGroupSnapshot]) -> Check {
    let found: Vec<String> = groups.iter().flat_map(trouble_of).collect();
    Check::warn_of(
        "endpoints",
        &found,
        (
            "none is avoided",
            "each gets the connects that it should have",
        ),
        "connects go to the other endpoints, or, where nothing is known, as without the balancer",
        "look at the endpoint: does it listen, is there a way to it; where nothing fresh is known, \
         see the checks of the API server and the daemon",
    )
}

/// What keeps a group's endpoints from having their connects.
fn trouble_of(group: &EndpointGroupSnapshot) -> Vec<String> {
    let unknown = group.known_for.is_some_and(|left| left.is_zero());
    let unknown =
        unknown.then(|| format!("{}: nothing fresh is known of the endpoints", group.name));
    let avoided = group.endpoints.iter().filter_map(|endpoint| {
        let (since, _) = endpoint.avoided?;
        Some(format!(
            "{}: {} is avoided, since {} s: {}; {} of {} connects have failed",
            group.name,
            endpoint.name,
            since.as_secs(),
            EndpointSnapshot::WHY_AVOIDED,
            endpoint.failed,
            endpoint.total
        ))
    });
    unknown.into_iter().chain(avoided).collect()
}

/// Connects that were left to sidecars; nothing where none was.
fn sidecars(groups: &[EndpointGroupSnapshot]) -> Option<Check> {
    let found: Vec<String> = groups
        .iter()
        .filter_map(|group| {
            let mut verdicts = group.verdicts.iter();
            let (_, count) = verdicts.find(|(reason, _)| *reason == PlaceReason::Sidecar)?;
            (*count > 0).then(|| format!("{}: {count} connects were left to one", group.name))
        })
        .collect();
    (!found.is_empty()).then(|| {
        Check::warn(
            "sidecars",
            listing(&found),
            "a sidecar (Istio, Linkerd) in the client's pod takes its connections and chooses the \
             server by its own rules; where a server is full, its quota refuses the sidecar",
            "where that is not meant, run these clients without a sidecar (Istio: the label \
             sidecar.istio.io/inject: \"false\"; Linkerd: the annotation linkerd.io/inject: \
             disabled); else let the sidecar choose by load (Istio: LEAST_REQUEST in a \
             DestinationRule)",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn a_refusal_is_told_with_its_reason() {
        let refused = PlacingNotes {
            refused: Some("another program sits there".to_owned()),
            ..PlacingNotes::default()
        };
        let check = attachment(false, &refused);
        assert_eq!(
            (check.status, &*check.found),
            (Status::Warn, "refused: another program sits there")
        );
        assert_eq!(
            attachment(true, &PlacingNotes::default()).status,
            Status::Ok
        );
        assert_eq!(
            attachment(false, &PlacingNotes::default()).status,
            Status::Warn
        );
    }

    #[test]
    fn what_there_is_no_room_for_is_told() {
        let notes = PlacingNotes {
            left_out: vec!["there is no room for `b`".to_owned()],
            ..PlacingNotes::default()
        };
        let check = room(&notes);
        assert_eq!(
            (check.status, &*check.found),
            (Status::Warn, "there is no room for `b`")
        );
        assert_eq!(room(&PlacingNotes::default()).status, Status::Ok);
    }
}
