"""What applications and deployments are called, for all who look for one or name one."""

TRIMTAB = "trimtab"
"""The application that speaks HTTP; its deployments are the gateway and the coordinator."""

BASE = "trimtab-base"
"""The base model's application."""

GUIDE_PREFIX = "trimtab-guide-"

GATEWAY = "Gateway"
COORDINATOR = "Coordinator"
BASE_MODEL = "BaseModel"
GUIDE = "Guide"


def guide_application(guide: str) -> str:
    """Return the name of a guide's application."""
    return GUIDE_PREFIX + guide


def guide_of(application: str) -> str:
    """Return the name of an application's guide."""
    return application.removeprefix(GUIDE_PREFIX)
